"""How kept tokens are represented. One file a storage; configuration in ``conf/method/storage/``."""
