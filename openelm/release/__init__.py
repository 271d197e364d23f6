"""What a finished run shows the world: its report page, its card, its proof."""
