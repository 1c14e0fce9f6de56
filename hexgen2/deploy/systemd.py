"""systemd units of a host's processes. Pure."""

from hexgen2.deploy.baremetal import CONFIG, STATE, Process
from hexgen2.security.callers import Caller

#: From SIGTERM to the end, beyond the time that running requests have: the engine's own end.
LEAVE_S = 20.0

#: Nothing but its own folder may be written, no privilege be gained, no other namespace be entered.
HARDENING = {
    "NoNewPrivileges": "yes",
    "CapabilityBoundingSet": "",
    "ProtectSystem": "strict",
    # Models may be there.
    "ProtectHome": "read-only",
    "PrivateTmp": "yes",
    "ProtectKernelTunables": "yes",
    "ProtectKernelModules": "yes",
    "ProtectKernelLogs": "yes",
    "ProtectControlGroups": "yes",
    "ProtectClock": "yes",
    "ProtectHostname": "yes",
    "RestrictSUIDSGID": "yes",
    "RestrictNamespaces": "yes",
    "RestrictRealtime": "yes",
    "LockPersonality": "yes",
    "SystemCallArchitectures": "native",
    "UMask": "0027",
}


def unit(process: Process, user: str, release: str) -> str:
    """The text of a unit that runs the software in the folder ``release``."""
    hardening = dict(HARDENING)
    if process.devices:
        # It closes every device but the simplest.
        del hardening["ProtectClock"]
    else:
        hardening["PrivateDevices"] = "yes"
    environment = {"HEXGEN2_HOME": str(STATE), "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    service: list[tuple[str, str]] = [
        # It says that it is ready by gRPC's health service, which whoever starts it asks.
        ("Type", "exec"),
        ("User", user),
        ("Group", user),
        ("ExecStart", f"{release}/bin/hexgen2 {process.command} --config {CONFIG}/{process.name}.yaml"),
        *(
            ("Environment", _quoted(f"{name}={value}"))
            for name, value in (environment | dict(process.environment)).items()
        ),
        ("WorkingDirectory", str(STATE)),
        ("StateDirectory", "hexgen2"),
        ("StateDirectoryMode", "0750"),
        ("Restart", "on-failure"),
        ("RestartSec", "3"),
        # A configuration that cannot be used does not become so by trying again.
        ("RestartPreventExitStatus", "2"),
        # Its children end with it; it is told first, alone, and lets running requests end.
        ("KillMode", "mixed"),
        ("TimeoutStopSec", f"{process.drain_s + LEAVE_S:.0f}"),
        ("LimitNOFILE", "65536"),
        *([("LimitMEMLOCK", "infinity")] if process.caller is Caller.WORKER else []),
        *([("CPUQuota", f"{process.cores * 100:.0f}%")] if process.cores else []),
        *hardening.items(),
    ]
    lines = [
        "[Unit]",
        f"Description=HexGen-2 {process.name}",
        "Wants=network-online.target",
        "After=network-online.target",
        "",
        "[Service]",
        *(f"{name}={value}" for name, value in service),
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    """As systemd reads it back: quotes, backslashes and percent signs stand for themselves."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{escaped}"'
