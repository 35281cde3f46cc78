"""Housekeeping of the table: rollups, days ahead, and days that are old enough to leave."""
