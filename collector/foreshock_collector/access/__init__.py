"""Who may write and read: tokens, and certificates."""
