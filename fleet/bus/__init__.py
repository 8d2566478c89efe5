"""Transport of bytes between named peers. Alone imports zmq, and knows no message."""
