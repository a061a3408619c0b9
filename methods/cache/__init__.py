"""The engine's side of a cache: it appends, attends and compresses, layer by layer, whatever the method."""
