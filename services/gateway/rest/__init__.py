"""The REST API: a translation of ``ChatService`` and nothing more."""
