"""Measurements of this machine: what ``hexgen2 bench`` runs."""
