# Everything a contributor runs. `uv run just RECIPE` needs nothing but uv.

default: lint test

# mitmdump with the access log on, e.g. `just run -p 8081`
run *arguments:
    mitmdump -s addon/artifactapi.py {{arguments}}

# origin, proxy, real clients and the rows they leave, on this machine alone
demo:
    python tests/demo.py

test *options:
    python -m pytest {{options}}

lint:
    ruff check .
    ruff format --check .
    mypy
    lint-imports

fix:
    ruff check --fix .
    ruff format .

# build the wheel and run it where no source tree is near
package:
    rm -rf dist
    uv build
    python tests/wheel_check.py dist/*.whl

# break everything around a proxy under load, e.g. `just chaos --minutes 10 --seed 7`
chaos *options:
    python -m tests.chaos {{options}}

# fill the table with made-up traffic of a month, e.g. `just seed-rows 100000`; 0 takes it out again
seed-rows rows *options:
    python -m tests.bench.seed_rows {{rows}} {{options}}

# measure what the log costs, and write docs/benchmarks.md; `just bench --quick` takes a minute
bench *options:
    uv run --group bench python -m tests.bench {{options}}

# the parts of it by themselves, in nanoseconds
microbench *options:
    uv run --group bench python -m pytest -W ignore::DeprecationWarning --benchmark-columns=min,median,iqr,rounds tests/bench/micro.py {{options}}
