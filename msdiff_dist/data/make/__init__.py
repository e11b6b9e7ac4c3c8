"""Making shards: from known data sets, folders of images, and encoded images; checking and timing them."""
