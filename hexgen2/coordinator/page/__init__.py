"""The coordinator's page: what the fleet is and does. ``view`` says what is shown, ``html`` and ``draw`` how."""
