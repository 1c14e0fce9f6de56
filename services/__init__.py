"""Thin processes over the ``hexgen2`` library: receive, call, send."""
