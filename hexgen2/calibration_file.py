"""A running fleet's plan and its error so far, from what `hexgen2 status --json` printed."""

import json
from pathlib import Path

from google.protobuf.json_format import ParseDict, ParseError

from hexgen2.calibration import Calibration
from hexgen2.errors import ConfigError, InvalidRequest
from hexgen2.placement import Placement, from_json
from hexgen2.rpc.calibration_convert import calibration_from_proto
from hexgen2.v1 import coordinator_pb2


def load_calibration(path: Path) -> tuple[Placement, Calibration]:
    """The plan that was in force, and how far its times were off. Raises ConfigError."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        answer = ParseDict(data, coordinator_pb2.GetPlanResponse(), ignore_unknown_fields=True)
        if not answer.plan_json:
            raise ConfigError(f"{path}: the fleet ran without a plan.yaml, so there is nothing to calibrate")
        return from_json(answer.plan_json), calibration_from_proto(answer.calibration)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from error
    except (ValueError, ParseError, InvalidRequest) as error:
        raise ConfigError(f"{path}: not what `hexgen2 status --json` prints: {error}") from error
