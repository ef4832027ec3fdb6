"""PostgreSQL: sessions, the cut, dumps, what no dump holds, and the renames of a switch."""
