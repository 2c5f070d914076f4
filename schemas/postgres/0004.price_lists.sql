-- Price lists: what some customers pay instead of a plan's prices. A kind of its own among the catalog's versions.

ALTER TYPE billing.catalog_kind ADD VALUE 'price_list';

COMMENT ON TABLE billing.catalog_version IS 'Immutable versions of accounts, contracts, meters, plans and price lists: the truth behind billing.catalog';
