//! Every metric Quire exports: name, kind, help, buckets. Dashboards, alerts and the exporter are checked against this list.
