"""What ranks have sent: records, and the steps put together from them. numpy, no clock."""
