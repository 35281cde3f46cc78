# Everything a contributor runs. `uv run just RECIPE` needs nothing but uv.

default: lint test

# mitmdump with the access log on, e.g. `just run -p 8081`
run *arguments:
    mitmdump -s addon/artifactapi.py {{arguments}}

# a local registry, a proxy, real clients, and the rows they leave; uses no network
demo:
    python tests/demo.py

# all tests, two at a time
test *options:
    python -m pytest --numprocesses 2 --dist loadfile {{options}}

# in under a minute: no proxy processes, no browser, nothing marked slow
test-fast *options:
    python -m pytest --numprocesses 2 --dist loadfile -m "not slow" tests/unit tests/postgres {{options}}

lint:
    ruff check .
    ruff format --check .
    mypy
    lint-imports --no-logo

fix:
    ruff check --fix .
    ruff format .

# build the wheel and use it outside the checkout
package:
    rm -rf dist
    uv build
    python tests/wheel_check.py dist/*.whl

# inject faults around a proxy under load, e.g. `just chaos --minutes 10 --seed 7`
chaos *options:
    python -m tests.chaos {{options}}

# fill the table with a month of generated traffic, e.g. `just seed-rows 100000`; 0 removes it
seed-rows rows *options:
    python -m tests.bench.seed_rows {{rows}} {{options}}

# measure what the log costs and write docs/benchmarks.md; `just bench --quick` takes a minute
bench *options:
    uv run --group bench python -m tests.bench {{options}}

# time the parts of the hook and the writer separately
microbench *options:
    uv run --group bench python -m pytest -W ignore::DeprecationWarning --benchmark-columns=min,median,iqr,rounds tests/bench/micro.py {{options}}
