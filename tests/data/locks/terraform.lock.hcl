# This file is maintained automatically by "terraform init".

provider "registry.terraform.example/hashicorp/aws" {
  version     = "5.31.0"
  hashes = [
    "zh:9c22e5898b2c8ae84aa31864d4e266c1d32164eaa82f38d40186256cfaf99a7c",
  ]
}

provider "registry.terraform.example/hashicorp/azurerm" {
  version     = "3.85.0"
  hashes = [
    "zh:00e66aa546b98366f056e506ffea124adad99538396499c6f44297237b967662",
  ]
}

provider "registry.terraform.example/hashicorp/google" {
  version     = "5.10.0"
  hashes = [
    "zh:e939f7725e2162c78db51eaeb66e4b1e92cdb641043b301ec4e18488885b81e5",
  ]
}

provider "registry.terraform.example/hashicorp/google-beta" {
  version     = "5.10.0"
  hashes = [
    "zh:e4aaaa941c2bdd664bf2e3092c3083f490e192f4d3244e099a8c58fbfeaa3137",
  ]
}

provider "registry.terraform.example/hashicorp/random" {
  version     = "3.6.0"
  hashes = [
    "zh:0fc999c1fdf0e1e78efa3966ceae7ff36eeb47c93142806a1d6a8c474798da9c",
  ]
}

provider "registry.terraform.example/hashicorp/null" {
  version     = "3.2.2"
  hashes = [
    "zh:813df788534fa8f4adae84bfe6990cbda1687f0237512d24e551592f513adb87",
  ]
}

provider "registry.terraform.example/hashicorp/local" {
  version     = "2.4.1"
  hashes = [
    "zh:42b56aec07e0eec9de159a9b3ac2d97846bdff65b1790526e933d85311e94db9",
  ]
}

provider "registry.terraform.example/hashicorp/tls" {
  version     = "4.0.5"
  hashes = [
    "zh:b106fbb7915fa1d368fb36dc08111ff1b136c67f92356953a5fc747a94634a41",
  ]
}

provider "registry.terraform.example/hashicorp/kubernetes" {
  version     = "2.25.2"
  hashes = [
    "zh:ccfbd4596c0a4be1e685b02dd2dd5a4539dbdcbc60e9d31f21f641b71b766a3a",
  ]
}

provider "registry.terraform.example/hashicorp/helm" {
  version     = "3.0.0-pre1"
  hashes = [
    "zh:d5c37b0b8461b26a30049d8e95e57eaa40459d1f7549b129db257b89261a4e8f",
  ]
}

provider "registry.terraform.example/hashicorp/cloudinit" {
  version     = "2.3.3"
  hashes = [
    "zh:a365e8a8305f0bdbcb210daf53ec7b1930837851d361ed1ff2fe62ade88565ec",
  ]
}

provider "registry.terraform.example/hashicorp/azuread" {
  version     = "2.47.0"
  hashes = [
    "zh:efbb560f84aefd83531928cb213596b0add978bcbdc4b9950bf9cbaf00b247ff",
  ]
}

provider "registry.terraform.example/hashicorp/hcp" {
  version     = "0.78.0"
  hashes = [
    "zh:0714ac1e9558608ab8d4c4e701ca9f82f2088c079985e7774c9f86755ac16e8f",
  ]
}

provider "registry.terraform.example/hashicorp/time" {
  version     = "0.10.0"
  hashes = [
    "zh:9968165560bb53f5e2d1e92d9e610a771ffe1be83a15e502f5a652461d3d1664",
  ]
}

provider "registry.terraform.example/hashicorp/archive" {
  version     = "2.4.1"
  hashes = [
    "zh:fe084c0c0c151e4ff559ffaf2193fe8e4bc69e432fa7909d254e5e14b7cd0349",
  ]
}

provider "registry.terraform.example/hashicorp/vault" {
  version     = "3.24.0"
  hashes = [
    "zh:baaaedfc8df1b9c43f92fbe98d6f579a8ed1edd7b029d9c57831a8a0ad9d1fe7",
  ]
}

provider "registry.terraform.example/hashicorp/template" {
  version     = "2.2.0"
  hashes = [
    "zh:adcd697be8e1007212091fc3b632a929069b63364e1e8956cf87e2e95d20c727",
  ]
}

provider "registry.terraform.example/hashicorp/tfe" {
  version     = "0.51.1"
  hashes = [
    "zh:ebc233a52e010e846c77083bc394db25e121e5386c1f5c5420251076f8a47a1f",
  ]
}

provider "registry.terraform.example/cloudflare/cloudflare" {
  version     = "5.0.0-alpha1"
  hashes = [
    "zh:0e624de185dbfbf1644c71ef58fac62e18c7a76caac7cf0fc91437d170b8dcc8",
  ]
}

provider "registry.terraform.example/integrations/github" {
  version     = "5.42.0"
  hashes = [
    "zh:ebf0192f8864bc1ed9589a7fc3c80a020922beb7491c4f9231b29c195f1a5e3e",
  ]
}

provider "registry.terraform.example/gavinbunney/kubectl" {
  version     = "1.14.0"
  hashes = [
    "zh:f2146cdcadd3c4c3afa6f3fdfdc36308ce2cdefb9fd559f434ba9ae3735eb3d4",
  ]
}

provider "registry.terraform.example/hetznercloud/hcloud" {
  version     = "1.45.0"
  hashes = [
    "zh:6e18284583cb8a56b01562317b8bae466819898b26f0cebd8428d50008955ac0",
  ]
}

provider "registry.terraform.example/bpg/proxmox" {
  version     = "0.42.0"
  hashes = [
    "zh:4ef0bf5d20aadb0fbcf8187812a692a0bc7c892e0dbc46cb252b8823e0d55084",
  ]
}

provider "registry.terraform.example/telmate/proxmox" {
  version     = "3.0.1-rc4"
  hashes = [
    "zh:b0515c467158a2f357ecc4c5f8b227d2f1a9c74663e34d20d958a1c928d7e427",
  ]
}

provider "registry.terraform.example/siderolabs/talos" {
  version     = "0.4.0"
  hashes = [
    "zh:bd23874fcbda676f3f13e1e2609eaef0b9f724e25afcfb92760c0e483d644b9f",
  ]
}

provider "registry.terraform.example/digitalocean/digitalocean" {
  version     = "2.34.1"
  hashes = [
    "zh:62cb577708250a545dcdebca2a2cb5ed5aabff8af02746531fabb52745042522",
  ]
}

provider "registry.terraform.example/oracle/oci" {
  version     = "5.24.0"
  hashes = [
    "zh:1067421440b4f9d609da7f38393b634c4f4293198ef9d9d7f4ba87788a6434a2",
  ]
}

provider "registry.terraform.example/ovh/ovh" {
  version     = "0.35.0"
  hashes = [
    "zh:18a335414a23be5f3b691511ee16cf29f50d4a043e48b7f66345f2b624736330",
  ]
}

provider "registry.terraform.example/f5networks/bigip" {
  version     = "1.20.1"
  hashes = [
    "zh:a11822c66afe56f0862ac852b6f1376b1de28b3b6cf83a61a7e5774e9837d15f",
  ]
}

provider "registry.terraform.example/1password/onepassword" {
  version     = "1.4.0"
  hashes = [
    "zh:b4adfb038a873421ab548e21800e1f298fd5d5fe0f5457ee793e7b2d26bf133c",
  ]
}

provider "registry.terraform.example/carlpett/sops" {
  version     = "1.0.0"
  hashes = [
    "zh:be495c73a22a2e5cc967feee8c3cffcafa6f53db2a13a0949f1e1f81ae33dddf",
  ]
}

provider "registry.terraform.example/kreuzwerker/docker" {
  version     = "3.0.2"
  hashes = [
    "zh:534d54333bc6cba64adcbdcce10b9474103e744fac7f728e843f07ac23a91739",
  ]
}

provider "registry.terraform.example/dmacvicar/libvirt" {
  version     = "0.7.6"
  hashes = [
    "zh:7d7d87814b9eb8c84bf140e613f0d90390aedd6bbcd5a25d996d1cb8ed86c143",
  ]
}

provider "registry.terraform.example/newrelic/newrelic" {
  version     = "3.27.7"
  hashes = [
    "zh:8091a783e912fdd03c1f0e27b79583426f617ac2120bdfb0e66415568fac1a8a",
  ]
}

provider "registry.terraform.example/datadog/datadog" {
  version     = "3.34.0"
  hashes = [
    "zh:e3c59697582e56c2e7c271753ea9cfa0d399cf2448c1c9f52ea58339f71990d2",
  ]
}

provider "registry.terraform.example/mongodb/mongodbatlas" {
  version     = "1.14.0"
  hashes = [
    "zh:db47227a03bde84b8d4bf52d5390228113556a03855317ae9937d6eb6896fa0c",
  ]
}

provider "registry.terraform.example/paloaltonetworks/panos" {
  version     = "1.11.1"
  hashes = [
    "zh:340e1f5aec9e0e588374f921786018d10ff0b9d5e1328d64be678766fd5b1c3e",
  ]
}

provider "registry.terraform.example/yandex-cloud/yandex" {
  version     = "0.105.0"
  hashes = [
    "zh:ed2b740ef2c9fb092f25e4f0eeb8fa494e0b52b0324916407f419a14b608e8f8",
  ]
}

provider "registry.terraform.example/terraform-coop/foreman" {
  version     = "0.6.1"
  hashes = [
    "zh:4797771d4641c333224dfa1c6494790f222d2a721e797d25769853daeaa0eae6",
  ]
}

provider "registry.terraform.example/elastic/ec" {
  version     = "0.9.0"
  hashes = [
    "zh:bac5a597267bd7dfa9d6d7b32cfb940501f322b7510fab86504620ecad987ded",
  ]
}

provider "registry.terraform.example/rancher/rancher2" {
  version     = "3.2.0"
  hashes = [
    "zh:2204801ef592454d0a1fe19e8c4d0669741fed8c4549ab7df4b7e18aaf693df2",
  ]
}

provider "registry.terraform.example/snowflake-labs/snowflake" {
  version     = "0.83.1"
  hashes = [
    "zh:d5012c51059a214e09c2f7dbc84563ac44d3497af8b7942407466989db718ba4",
  ]
}
