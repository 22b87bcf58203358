"""Teachers: where a signal comes from; a method never knows."""
