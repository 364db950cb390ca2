"""Every alert, in the order of the rule files."""

from __future__ import annotations

from foreshock_collector.alerting.early_signs import EARLY_SIGNS
from foreshock_collector.alerting.failures import FAILURES
from foreshock_collector.alerting.monitor import MONITOR
from foreshock_collector.alerting.silence import SILENCE

ALERTS = (*EARLY_SIGNS, *FAILURES, *SILENCE, *MONITOR)
