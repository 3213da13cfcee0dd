"""WHAT IS TYPED: one file per group of commands. Each command imports only what it needs, when it runs."""
