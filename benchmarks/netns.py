"""Where ``hexgen2.netns`` was."""

from hexgen2.netns import Link, Namespace, NetnsError, enter, why_not

__all__ = ["Link", "Namespace", "NetnsError", "enter", "why_not"]
