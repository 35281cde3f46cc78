"""Days of access_log as Parquet files: write them verified, read them, restore them. Decides nothing about which."""
