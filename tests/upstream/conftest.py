# `make test` must not collect anything here: these files drive PEFT's test-suite, see `run.py` (`make test-peft`).
collect_ignore_glob = ["*"]
