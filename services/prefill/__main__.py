"""The prefill worker process: ``python -m services.prefill --config worker.yaml``."""

from hexgen2.cli.options import run_service
from hexgen2.config import WorkerConfig
from hexgen2.worker.serve import serve


def main() -> None:
    """Entry point."""
    run_service("prefill", WorkerConfig, serve)


if __name__ == "__main__":
    main()
