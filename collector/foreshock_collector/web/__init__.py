"""HTTP out: /metrics, the API, the page."""
