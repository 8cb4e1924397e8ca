"""Exact nearest neighbours, retrieval metrics, Faiss indexes and structure-aware search, over embeddings.

May not live here: models and images, and any step that holds all similarities of queries and gallery at once.
"""
