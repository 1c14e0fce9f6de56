"""Further ranks of a replica on another machine: ``python -m services.node --config node.yaml``."""

from hexgen2.cli.options import run_service
from hexgen2.config import NodeConfig
from hexgen2.worker.node import serve


def main() -> None:
    """Entry point."""
    run_service("node", NodeConfig, serve)


if __name__ == "__main__":
    main()
