"""What every report draws with: grids, sheets, fonts, colours, statistics."""
