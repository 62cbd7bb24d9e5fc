"""Compressed caches in use: documents that are read once, conversations, and code that calls `generate` itself."""

from kvcompress.reuse.chat import Chat
from kvcompress.reuse.document import Document
from kvcompress.reuse.session import Session, compressing

__all__ = ["Chat", "Document", "Session", "compressing"]
