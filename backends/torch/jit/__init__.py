"""The road of ``torch.compile``: from dynamo's graphs to compiled ones, with weights packed once for all of them."""
