"""Pictures and points with labels or captions, by source."""
