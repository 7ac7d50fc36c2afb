"""Parts of `gps_images.py`."""
