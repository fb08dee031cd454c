"""Operations on a finished or running output. Reads receipts, footers and ranges; changes nothing.

- `inspect`: one file, index or receipt, or a whole output
- `status`: how far a build has come
- `verify`: every receipt, file, byte and offset checked
"""
