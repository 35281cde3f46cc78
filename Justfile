# Everything a contributor runs. `uv run just RECIPE` needs nothing but uv.

# uv says where it is, since it may not be on PATH.
uv := quote(env("UV", "uv"))
dev := uv + " run --group dev"
bench := uv + " run --group bench --group dev"
pytest := "python -m pytest --numprocesses 2 --dist loadfile"
version_tests := "tests/unit tests/postgres tests/proxy/test_endings.py tests/proxy/test_mitmweb.py"

default: lint test

# mitmdump with the access log on, e.g. `just run -p 8081`
run *arguments:
    mitmdump -s addon/artifactapi.py {{arguments}}

# a local registry, a proxy, real clients, and the rows they leave; uses no network
demo:
    {{dev}} python tests/demo.py

# all tests, two at a time
test *options:
    {{dev}} {{pytest}} {{options}}

# in a minute or two: no proxy processes, no browser, nothing marked slow
test-fast *options:
    {{dev}} {{pytest}} -m "not slow" tests/unit tests/postgres {{options}}

# tests with the lowest versions that pyproject.toml allows, on Python 3.12; leaves .venv as it is
test-lowest *options=version_tests:
    PYENV_VERSION=3.12 {{uv}} run --isolated --python 3.12 --resolution lowest-direct --group dev {{pytest}} {{options}}

# tests with the newest versions, e.g. `just test-newest 3.14`; leaves .venv as it is
test-newest python="3.13" *options=version_tests:
    PYENV_VERSION={{python}} {{uv}} run --isolated --python {{python}} --upgrade --group dev {{pytest}} {{options}}

lint:
    {{dev}} ruff check .
    {{dev}} ruff format --check .
    {{dev}} mypy
    {{dev}} lint-imports --no-logo

fix:
    {{dev}} ruff check --fix .
    {{dev}} ruff format .

# build the wheel and use it outside the checkout
package:
    rm -rf dist
    {{uv}} build
    {{dev}} python tests/wheel_check.py dist/*.whl

# inject faults around a proxy under load, e.g. `just chaos --minutes 10 --seed 7` or `just chaos --minutes 60 --kills 70`;
# on a server that runs already: `just chaos --proxies 20 --dsn "host=db.example dbname=scratch user=owner"`
[positional-arguments]
chaos *options:
    {{dev}} python -m tests.chaos "$@"

# fill the table with a month of generated traffic, e.g. `just seed-rows 100000`; 0 removes it
seed-rows rows *options:
    {{dev}} python -m tests.bench.seed_rows {{rows}} {{options}}

# measure what the log costs and write docs/benchmarks.md; `just bench --quick` takes a minute
bench *options:
    {{bench}} python -m tests.bench {{options}}

# time the parts of the hook and the writer separately
microbench *options:
    {{bench}} python -m pytest -W ignore::DeprecationWarning --benchmark-columns=min,median,iqr,rounds tests/bench/micro.py {{options}}
