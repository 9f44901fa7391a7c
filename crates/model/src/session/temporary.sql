-- The temporary objects of the session that asks, as statements that make them again, under
-- search_path = pg_catalog, pg_temp. Columns: phase, owner, text. Phases: 0 a reason that it cannot be done, 1 what is
-- made before the rows are there, 2 a table whose rows are to be carried, 3 a sequence, 4 what is
-- made afterwards, 5 what is said of all of them. Within a phase the order is that of OIDs: what an object needs was
-- made before it, but for later changes.
WITH s AS MATERIALIZED (SELECT pg_my_temp_schema() AS oid),
c AS MATERIALIZED (
    SELECT c.*, format('pg_temp.%I', relname) AS q, pg_get_userbyid(relowner)::text AS owner
    FROM pg_class c JOIN s ON relnamespace = s.oid),
t AS MATERIALIZED (
    SELECT t.*, format('pg_temp.%I', typname) AS q, pg_get_userbyid(typowner)::text AS owner
    FROM pg_type t JOIN s ON typnamespace = s.oid),
f AS MATERIALIZED (
    SELECT f.*, format('pg_temp.%I(%s)', proname, pg_get_function_identity_arguments(f.oid)) AS q,
        pg_get_userbyid(proowner)::text AS owner
    FROM pg_proc f JOIN s ON pronamespace = s.oid),
a AS MATERIALIZED (
    SELECT c.relkind, c.owner, c.q, a.*, x.oid AS def_oid, pg_get_expr(x.adbin, x.adrelid) AS def, y.typcollation, y.typstorage
    FROM c JOIN pg_attribute a ON a.attrelid = c.oid JOIN pg_type y ON y.oid = a.atttypid
    LEFT JOIN pg_attrdef x ON x.adrelid = c.oid AND x.adnum = a.attnum
    WHERE a.attnum > 0 AND NOT a.attisdropped AND c.relkind IN ('r', 'v', 'c')),
seq AS MATERIALIZED (
    SELECT c.oid, c.owner, c.q, d.deptype, d.refobjid, d.refobjsubid,
        format_type(seqtypid, NULL) AS type, format('INCREMENT BY %s MINVALUE %s MAXVALUE %s START WITH %s CACHE %s %s', seqincrement, seqmin, seqmax, seqstart, seqcache, CASE WHEN seqcycle THEN 'CYCLE' ELSE 'NO CYCLE' END) AS options
    FROM c JOIN pg_sequence ON seqrelid = c.oid LEFT JOIN pg_depend d ON d.classid = 'pg_class'::regclass
        AND d.objid = c.oid AND d.refclassid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')),
col AS MATERIALIZED (
    SELECT attrelid, string_agg(format('%I %s', attname, format_type(atttypid, atttypmod))
        || coalesce((SELECT format(' COLLATE %I.%I', nspname, collname) FROM pg_collation k
            JOIN pg_namespace n ON n.oid = collnamespace WHERE k.oid = attcollation AND attcollation <> typcollation), '')
        || CASE WHEN relkind = 'c' OR attgenerated = '' THEN ''
            ELSE format(' GENERATED ALWAYS AS (%s) %s', def, CASE attgenerated WHEN 's' THEN 'STORED' ELSE 'VIRTUAL' END) END
        || CASE attidentity WHEN '' THEN '' ELSE (SELECT format(' GENERATED %s AS IDENTITY (SEQUENCE NAME %s %s)',
            CASE attidentity WHEN 'a' THEN 'ALWAYS' ELSE 'BY DEFAULT' END, seq.q, options)
            FROM seq WHERE refobjid = attrelid AND refobjsubid = attnum AND deptype = 'i') END
        || CASE WHEN attnotnull AND relkind = 'r' AND current_setting('server_version_num')::int < 180000
            THEN ' NOT NULL' ELSE '' END, ', ' ORDER BY attnum) AS text
    FROM a GROUP BY 1),
acl AS MATERIALIZED (
    SELECT c.oid, 0 AS sub, c.owner, CASE relkind WHEN 'S' THEN 'SEQUENCE' ELSE 'TABLE' END AS kind, q, '' AS part, relacl AS acl
    FROM c WHERE relkind IN ('r', 'v', 'S') UNION ALL
    SELECT attrelid, attnum, owner, 'TABLE', q, format(' (%I)', attname), attacl FROM a UNION ALL
    SELECT f.oid, 0, owner, CASE prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END, q, '', proacl FROM f UNION ALL
    SELECT t.oid, 0, owner, 'TYPE', q, '', typacl FROM t),
commented AS MATERIALIZED (
    SELECT d.*, CASE
        WHEN classoid = 'pg_class'::regclass AND objsubid = 0 THEN (SELECT format('%s %s', CASE relkind WHEN 'r' THEN 'TABLE'
            WHEN 'v' THEN 'VIEW' WHEN 'S' THEN 'SEQUENCE' WHEN 'i' THEN 'INDEX' END, q) FROM c WHERE c.oid = objoid)
        WHEN classoid = 'pg_class'::regclass THEN
            (SELECT format('COLUMN %s.%I', q, attname) FROM a WHERE attrelid = objoid AND attnum = objsubid)
        WHEN classoid = 'pg_type'::regclass THEN
            (SELECT format('%s %s', CASE typtype WHEN 'd' THEN 'DOMAIN' ELSE 'TYPE' END, q) FROM t WHERE t.oid = objoid)
        WHEN classoid = 'pg_proc'::regclass THEN
            (SELECT format('%s %s', CASE prokind WHEN 'p' THEN 'PROCEDURE' ELSE 'FUNCTION' END, q) FROM f WHERE f.oid = objoid)
        WHEN classoid = 'pg_constraint'::regclass THEN
            coalesce((SELECT format('CONSTRAINT %I ON %s', conname, q) FROM pg_constraint k JOIN c ON c.oid = conrelid WHERE k.oid = objoid),
                (SELECT format('CONSTRAINT %I ON DOMAIN %s', conname, q) FROM pg_constraint k JOIN t ON t.oid = contypid WHERE k.oid = objoid))
        WHEN classoid = 'pg_trigger'::regclass THEN
            (SELECT format('TRIGGER %I ON %s', tgname, q) FROM pg_trigger g JOIN c ON c.oid = tgrelid WHERE g.oid = objoid)
        END AS object,
        CASE
        WHEN classoid = 'pg_class'::regclass THEN (SELECT owner FROM c WHERE c.oid = objoid)
        WHEN classoid = 'pg_type'::regclass THEN (SELECT owner FROM t WHERE t.oid = objoid)
        WHEN classoid = 'pg_proc'::regclass THEN (SELECT owner FROM f WHERE f.oid = objoid)
        WHEN classoid = 'pg_constraint'::regclass THEN coalesce(
            (SELECT owner FROM pg_constraint k JOIN c ON c.oid = conrelid WHERE k.oid = objoid),
            (SELECT owner FROM pg_constraint k JOIN t ON t.oid = contypid WHERE k.oid = objoid))
        WHEN classoid = 'pg_trigger'::regclass THEN (SELECT owner FROM pg_trigger g JOIN c ON c.oid = tgrelid WHERE g.oid = objoid)
        WHEN classoid = 'pg_rewrite'::regclass THEN (SELECT owner FROM pg_rewrite g JOIN c ON c.oid = ev_class WHERE g.oid = objoid)
        WHEN classoid = 'pg_statistic_ext'::regclass THEN
            (SELECT pg_get_userbyid(stxowner)::text FROM pg_statistic_ext g JOIN s ON s.oid = stxnamespace WHERE g.oid = objoid)
        END AS owner
    FROM pg_description d),
row AS (
    -- What cannot be made again from here.
    SELECT 0 AS phase, c.oid, 0 AS sub, c.owner, q || ' ' || CASE
        WHEN relkind NOT IN ('r', 'v', 'S', 'i', 'c', 't') THEN 'is of a kind that is not known'
        WHEN relispartition OR EXISTS (SELECT FROM pg_inherits WHERE c.oid IN (inhrelid, inhparent)) THEN 'inherits'
        WHEN reloftype <> 0 THEN 'is of a composite type'
        WHEN relrowsecurity OR relforcerowsecurity THEN 'has row security'
        WHEN relkind = 'r' AND relreplident <> 'd' THEN 'has a replica identity'
        WHEN relkind = 'i' AND reltablespace <> 0 THEN 'has a tablespace of its own'
        WHEN EXISTS (SELECT FROM pg_class WHERE pg_class.oid = c.reltoastrelid AND pg_class.reloptions IS NOT NULL)
            THEN 'has options of its TOAST table'
        WHEN EXISTS (SELECT FROM pg_index WHERE indexrelid = c.oid AND NOT indisvalid) THEN 'is not valid'
        WHEN EXISTS (SELECT FROM pg_attribute WHERE c.relkind = 'i' AND attrelid = c.oid AND attstattarget >= 0)
            THEN 'has a statistics target'
        WHEN EXISTS (SELECT FROM pg_policy WHERE polrelid = c.oid) THEN 'has a policy'
        END AS text
    FROM c UNION ALL
    SELECT 0, t.oid, 0, owner, CASE WHEN typtype = 'd' AND NOT EXISTS (SELECT FROM pg_constraint WHERE contypid = t.oid AND NOT convalidated)
        OR typtype IN ('e', 'c') OR typtype = 'b' AND typcategory = 'A' THEN NULL ELSE q || ' is a type that is not known' END FROM t UNION ALL
    SELECT 0, f.oid, 0, owner, q || ' is an aggregate' FROM f WHERE prokind = 'a' UNION ALL
    SELECT 0, objid, 0, '', pg_describe_object(classid, objid, objsubid) || ' is in the temporary schema' FROM pg_depend JOIN s
        ON refclassid = 'pg_namespace'::regclass AND refobjid = s.oid
        WHERE classid NOT IN ('pg_class'::regclass, 'pg_type'::regclass, 'pg_proc'::regclass, 'pg_statistic_ext'::regclass) UNION ALL
    SELECT 0, objid, 0, '', pg_describe_object(classid, objid, objsubid) || ' depends on a temporary object' FROM pg_depend d
        WHERE (refclassid = 'pg_class'::regclass AND refobjid IN (SELECT oid FROM c)
            OR refclassid = 'pg_type'::regclass AND refobjid IN (SELECT oid FROM t)
            OR refclassid = 'pg_proc'::regclass AND refobjid IN (SELECT oid FROM f))
        AND NOT CASE classid
            WHEN 'pg_class'::regclass THEN objid IN (SELECT oid FROM c) OR EXISTS (SELECT FROM c WHERE reltoastrelid = objid)
            WHEN 'pg_type'::regclass THEN objid IN (SELECT oid FROM t)
            WHEN 'pg_proc'::regclass THEN objid IN (SELECT oid FROM f)
            WHEN 'pg_attrdef'::regclass THEN TRUE
            WHEN 'pg_constraint'::regclass THEN EXISTS (SELECT FROM pg_constraint k WHERE k.oid = objid
                AND (conrelid IN (SELECT oid FROM c) OR contypid IN (SELECT oid FROM t)))
            WHEN 'pg_rewrite'::regclass THEN EXISTS (SELECT FROM pg_rewrite k JOIN c ON c.oid = ev_class WHERE k.oid = objid)
            WHEN 'pg_trigger'::regclass THEN EXISTS (SELECT FROM pg_trigger k JOIN c ON c.oid = tgrelid WHERE k.oid = objid)
            WHEN 'pg_statistic_ext'::regclass THEN EXISTS (SELECT FROM pg_statistic_ext k JOIN s ON s.oid = stxnamespace WHERE k.oid = objid)
            ELSE FALSE END UNION ALL
    SELECT 0, objoid, 0, '', pg_describe_object(classoid, objoid, objsubid) || ' has a comment'
        FROM commented WHERE owner IS NOT NULL AND object IS NULL UNION ALL
    SELECT 0, objoid, 0, '', pg_describe_object(classoid, objoid, objsubid) || ' has a security label' FROM pg_seclabel
        WHERE objoid IN (SELECT oid FROM c UNION SELECT oid FROM t UNION SELECT oid FROM f) UNION ALL

    SELECT 1, c.oid, 0, owner, format('CREATE TEMP TABLE %s (%s) USING %I%s ON COMMIT PRESERVE ROWS%s', q,
        concat_ws(', ', (SELECT text FROM col WHERE attrelid = c.oid),
            (SELECT string_agg(format('CONSTRAINT %I %s', conname, pg_get_constraintdef(k.oid)), ', ' ORDER BY k.oid)
                FROM pg_constraint k WHERE conrelid = c.oid AND contype = 'n')),
        (SELECT amname FROM pg_am WHERE pg_am.oid = relam), ' WITH (' || array_to_string(reloptions, ', ') || ')',
        (SELECT format(' TABLESPACE %I', spcname) FROM pg_tablespace WHERE pg_tablespace.oid = reltablespace))
        FROM c WHERE relkind = 'r' UNION ALL
    SELECT 1, attrelid, attnum, owner, format('ALTER TABLE %s ALTER COLUMN %I %s', q, attname, change) FROM a, LATERAL (
        SELECT 'SET STATISTICS ' || attstattarget WHERE attstattarget >= 0 UNION ALL
        SELECT 'SET STORAGE ' || CASE attstorage WHEN 'p' THEN 'PLAIN' WHEN 'e' THEN 'EXTERNAL' WHEN 'm' THEN 'MAIN' ELSE 'EXTENDED' END
            WHERE attstorage <> typstorage UNION ALL
        SELECT 'SET COMPRESSION ' || CASE attcompression WHEN 'p' THEN 'pglz' ELSE 'lz4' END WHERE attcompression <> '' UNION ALL
        SELECT 'SET (' || array_to_string(attoptions, ', ') || ')' WHERE attoptions IS NOT NULL) x (change)
        WHERE relkind = 'r' UNION ALL
    SELECT 1, def_oid, 0, owner, format('ALTER TABLE %s ALTER COLUMN %I SET DEFAULT %s', q, attname, def)
        FROM a WHERE def IS NOT NULL AND attgenerated = '' UNION ALL
    SELECT DISTINCT 1, oid, 0, owner, format('CREATE TEMP SEQUENCE %s AS %s %s', q, type, options) FROM seq WHERE deptype IS DISTINCT FROM 'i' UNION ALL
    SELECT 1, c.oid, 0, owner, format('CREATE TEMP VIEW %s (%s)%s AS %s', q,
        (SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum) FROM a WHERE attrelid = c.oid),
        ' WITH (' || array_to_string(reloptions, ', ') || ')', pg_get_viewdef(c.oid)) FROM c WHERE relkind = 'v' UNION ALL
    SELECT 1, t.oid, 0, owner, format('CREATE TYPE %s AS ENUM (%s)', q,
        (SELECT string_agg(quote_literal(enumlabel), ', ' ORDER BY enumsortorder) FROM pg_enum WHERE enumtypid = t.oid))
        FROM t WHERE typtype = 'e' UNION ALL
    SELECT 1, t.oid, 0, t.owner, format('CREATE TYPE %s AS (%s)', t.q, (SELECT text FROM col WHERE attrelid = typrelid))
        FROM t JOIN c ON c.oid = typrelid AND relkind = 'c' UNION ALL
    SELECT 1, t.oid, 0, owner, format('CREATE DOMAIN %s AS %s%s%s%s', q, format_type(typbasetype, typtypmod),
        (SELECT format(' COLLATE %I.%I', nspname, collname) FROM pg_collation k JOIN pg_namespace n ON n.oid = collnamespace
            JOIN pg_type b ON b.oid = t.typbasetype WHERE k.oid = t.typcollation AND t.typcollation <> b.typcollation),
        ' DEFAULT ' || pg_get_expr(typdefaultbin, 0),
        (SELECT string_agg(format(' CONSTRAINT %I %s', conname, pg_get_constraintdef(k.oid)), '' ORDER BY k.oid)
            FROM pg_constraint k WHERE contypid = t.oid)
        || CASE WHEN typnotnull AND current_setting('server_version_num')::int < 170000 THEN ' NOT NULL' ELSE '' END)
        FROM t WHERE typtype = 'd' UNION ALL
    SELECT 1, f.oid, 0, owner, pg_get_functiondef(f.oid) FROM f WHERE prokind <> 'a' UNION ALL

    SELECT 2, c.oid, 0, owner, format('%s %s %s', pg_table_size(c.oid), CASE WHEN reltuples >= 0 THEN 'analyzed' ELSE '-' END, q)
        FROM c WHERE relkind = 'r' UNION ALL
    SELECT 3, c.oid, 0, owner, q FROM c WHERE relkind = 'S' UNION ALL

    SELECT 4, k.oid, 0, owner, format('ALTER TABLE %s ADD CONSTRAINT %I %s', q, conname, pg_get_constraintdef(k.oid))
        FROM pg_constraint k JOIN c ON c.oid = conrelid WHERE contype IN ('c', 'u', 'p', 'f', 'x') AND relkind = 'r' UNION ALL
    SELECT 4, indexrelid, 0, c.owner, pg_get_indexdef(indexrelid) FROM pg_index JOIN c ON c.oid = indrelid
        WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('u', 'p', 'x')) UNION ALL
    SELECT 5, 0, 0, c.owner, format('ALTER INDEX %s SET (%s)', i.q, array_to_string(i.reloptions, ', ')) FROM c i
        JOIN pg_index ON indexrelid = i.oid JOIN c ON c.oid = indrelid WHERE i.reloptions IS NOT NULL
        AND EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid AND contype IN ('u', 'p', 'x')) UNION ALL
    SELECT 5, 0, 1, c.owner, format('ALTER TABLE %s CLUSTER ON %I', c.q, i.relname) FROM pg_index
        JOIN c ON c.oid = indrelid JOIN c i ON i.oid = indexrelid WHERE indisclustered UNION ALL
    SELECT 4, g.oid, 0, owner, pg_get_triggerdef(g.oid) FROM pg_trigger g JOIN c ON c.oid = tgrelid WHERE NOT tgisinternal UNION ALL
    SELECT 4, g.oid, 1, owner, format('ALTER TABLE %s %s TRIGGER %I', q, CASE tgenabled WHEN 'D' THEN 'DISABLE'
        WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, tgname)
        FROM pg_trigger g JOIN c ON c.oid = tgrelid WHERE NOT tgisinternal AND tgenabled <> 'O' UNION ALL
    SELECT 4, g.oid, 0, owner, pg_get_ruledef(g.oid) FROM pg_rewrite g JOIN c ON c.oid = ev_class WHERE rulename <> '_RETURN' UNION ALL
    SELECT 4, g.oid, 1, owner, format('ALTER TABLE %s %s RULE %I', q, CASE ev_enabled WHEN 'D' THEN 'DISABLE'
        WHEN 'R' THEN 'ENABLE REPLICA' ELSE 'ENABLE ALWAYS' END, rulename)
        FROM pg_rewrite g JOIN c ON c.oid = ev_class WHERE rulename <> '_RETURN' AND ev_enabled <> 'O' UNION ALL
    SELECT 4, g.oid, 0, pg_get_userbyid(stxowner)::text, pg_get_statisticsobjdef(g.oid) FROM pg_statistic_ext g JOIN s ON s.oid = stxnamespace UNION ALL
    SELECT 4, g.oid, 1, pg_get_userbyid(stxowner)::text, format('ALTER STATISTICS pg_temp.%I SET STATISTICS %s', stxname, stxstattarget)
        FROM pg_statistic_ext g JOIN s ON s.oid = stxnamespace WHERE stxstattarget >= 0 UNION ALL
    SELECT 5, 0, 2, seq.owner, format('ALTER SEQUENCE %s OWNED BY %s.%I', seq.q, a.q, attname)
        FROM seq JOIN a ON attrelid = refobjid AND attnum = refobjsubid WHERE deptype = 'a' UNION ALL
    SELECT 5, 0, 3, owner, format('COMMENT ON %s IS %L', object, description) FROM commented WHERE object IS NOT NULL UNION ALL
    SELECT 5, 0, 4, owner, format('REVOKE ALL ON %s %s FROM PUBLIC, %I', kind, q, owner) FROM acl WHERE acl IS NOT NULL AND sub = 0 UNION ALL
    SELECT 5, 0, 5, owner, format('GRANT %s%s ON %s %s TO %s%s', privilege_type, part, kind, q,
        CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
        CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
        || CASE WHEN pg_get_userbyid(grantor) = owner THEN '' ELSE format(' GRANTED BY %I', pg_get_userbyid(grantor)) END
        FROM acl, aclexplode(acl) WHERE acl IS NOT NULL)
SELECT phase::text, owner, CASE phase WHEN 0 THEN regexp_replace(text, '\mpg_temp_\d+\.', 'pg_temp.', 'g') ELSE text END
FROM row WHERE text IS NOT NULL
ORDER BY phase, oid, sub, text
