"""The ops of a decoder block: plain torch reference and backends. Imports torch only."""
