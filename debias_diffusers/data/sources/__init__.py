"""Sources of images: the embedded data sets, a folder, a parquet file, shards, a saved dataset, a data set on the Hub."""
