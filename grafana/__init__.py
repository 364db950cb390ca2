"""Grafana dashboards and alert rules, generated: `python -m grafana.make` writes them, the JSON is committed."""
