"""`flap serve`: a model and a folder of sounds over HTTP, for one machine and few people."""
