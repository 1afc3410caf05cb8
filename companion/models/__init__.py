"""Complete models, assembled from the mechanisms of the floor below."""
