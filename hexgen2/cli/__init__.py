"""The ``hexgen2`` command."""
