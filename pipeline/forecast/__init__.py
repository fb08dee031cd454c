"""`lathe plan`: what a build would do."""
