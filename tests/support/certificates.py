"""Make certificates for test servers: a valid one, and one for each way to be invalid."""

import datetime as dt
import ipaddress
from pathlib import Path
from typing import Literal

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

type Kind = Literal["good", "wrong-host", "expired"]


def certificate(folder: Path, kind: Kind = "good") -> Path:
    """Write a self-signed certificate and its key to one PEM file in `folder`.

    The good certificate covers localhost, 127.0.0.1 and ::1. Clients can also trust the file as
    their certificate authority. Each of the others has one fault.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    signed = _builder(key.public_key(), kind).sign(key, hashes.SHA256())
    path = folder / f"{kind}.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + signed.public_bytes(serialization.Encoding.PEM)
    )
    path.chmod(0o600)
    return path


def _builder(key: ec.EllipticCurvePublicKey, kind: Kind) -> x509.CertificateBuilder:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{kind} test server")])
    begin, end = _validity(kind)
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectAlternativeName(_names(kind)), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _validity(kind: Kind) -> tuple[dt.datetime, dt.datetime]:
    now = dt.datetime.now(dt.UTC)
    if kind == "expired":
        return now - dt.timedelta(days=30), now - dt.timedelta(days=1)
    return now - dt.timedelta(days=1), now + dt.timedelta(days=30)


def _names(kind: Kind) -> list[x509.GeneralName]:
    if kind == "wrong-host":
        return [x509.DNSName("elsewhere.invalid")]
    addresses = [ipaddress.ip_address(text) for text in ("127.0.0.1", "::1")]
    return [x509.DNSName("localhost"), *(x509.IPAddress(address) for address in addresses)]


def _key_usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=True,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
