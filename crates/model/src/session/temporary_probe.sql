-- Gives every temporary table without rows a page, by a row that is taken back at once. If the table deletes its rows
-- at commit, the commit that follows takes the page as well (`PreCommit_on_commit_actions`), and the table's file is
-- empty: no catalog shows this. What would refuse the row is taken off and comes back with it.
DO LANGUAGE plpgsql $holdfast$
DECLARE t record; k record; has boolean; names text; nulls text;
BEGIN
    FOR t IN SELECT c.oid, format('pg_temp.%I', relname) AS q, pg_get_userbyid(relowner)::text AS owner FROM pg_class c
        WHERE relnamespace = pg_my_temp_schema() AND relkind = 'r' LOOP
        PERFORM set_config('role', t.owner, true);
        EXECUTE format('SELECT EXISTS (SELECT FROM %s)', t.q) INTO has;
        IF has THEN CONTINUE; END IF;
        BEGIN
            EXECUTE format('ALTER TABLE %s DISABLE TRIGGER USER', t.q);
            FOR k IN SELECT rulename FROM pg_rewrite WHERE ev_class = t.oid LOOP
                EXECUTE format('DROP RULE %I ON %s', k.rulename, t.q);
            END LOOP;
            FOR k IN SELECT conname FROM pg_constraint WHERE conrelid = t.oid AND contype IN ('c', 'u', 'p', 'f', 'x') LOOP
                EXECUTE format('ALTER TABLE %s DROP CONSTRAINT IF EXISTS %I CASCADE', t.q, k.conname);
            END LOOP;
            FOR k IN SELECT attname, attidentity FROM pg_attribute
                WHERE attrelid = t.oid AND attnum > 0 AND NOT attisdropped AND (attnotnull OR attidentity <> '') LOOP
                EXECUTE format('ALTER TABLE %s ALTER COLUMN %I DROP IDENTITY IF EXISTS', t.q, k.attname);
                EXECUTE format('ALTER TABLE %s ALTER COLUMN %I DROP NOT NULL', t.q, k.attname);
            END LOOP;
            SELECT string_agg(quote_ident(attname), ', ' ORDER BY attnum), string_agg('NULL', ', ') INTO names, nulls
                FROM pg_attribute WHERE attrelid = t.oid AND attnum > 0 AND NOT attisdropped AND attgenerated = '';
            EXECUTE CASE WHEN names IS NULL THEN format('INSERT INTO %s DEFAULT VALUES', t.q)
                ELSE format('INSERT INTO %s (%s) VALUES (%s)', t.q, names, nulls) END;
            RAISE SQLSTATE 'HF001';
        EXCEPTION WHEN SQLSTATE 'HF001' THEN NULL;
            WHEN OTHERS THEN RAISE INFO 'holdfast: unclear %', t.q;
        END;
    END LOOP;
END $holdfast$
