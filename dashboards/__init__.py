"""Grafana dashboards and Prometheus rules, as code. `python -m dashboards.build` writes what is in grafana/."""
