"""The alerts, and the Prometheus rule file made from them."""
