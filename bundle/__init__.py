"""What a bundle is: its manifest, the checks of it, how it is read (numpy and the standard library only)."""
