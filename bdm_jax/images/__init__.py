"""Decoding of image files, PNG output, contact sheets and charts."""
