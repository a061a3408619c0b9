"""Which tokens each layer keeps. One file a method; configuration in ``conf/method/``."""
