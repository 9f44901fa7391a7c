#!/usr/bin/node
// Conformance program for node-pg (its own protocol code, text format mostly).
// See README.md for the contract: the transcript holds only facts that do not
// change between two runs.
'use strict'

const crypto = require('crypto')
const fs = require('fs')
const pg = require('pg')
const Cursor = require('pg-cursor')

const SCHEMA = 'drv_node'
const CASE_MS = 20000
const cases = []

function tls() {
  const mode = process.env.PGSSLMODE || 'disable'
  if (['disable', 'allow', 'prefer'].includes(mode)) return false
  const root = process.env.PGSSLROOTCERT
  const ssl = { rejectUnauthorized: mode.startsWith('verify') }
  if (root) ssl.ca = fs.readFileSync(root, 'utf8')
  // 'verify-ca' checks the chain but not the name.
  if (mode === 'verify-ca') ssl.checkServerIdentity = () => undefined
  return ssl
}
// node-pg would read PGSSLMODE in its own way, without PGSSLROOTCERT.
const SSL = tls()
delete process.env.PGSSLMODE

const md5 = (data) => crypto.createHash('md5').update(data).digest('hex')
const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms))
const show = (...items) =>
  console.log(...items.map((x) => (typeof x === 'string' ? x : JSON.stringify(x, replacer))))

function replacer(key, value) {
  const raw = this[key]
  if (Buffer.isBuffer(raw)) return `bytes ${raw.length} ${md5(raw)}`
  if (raw instanceof Date) return `date ${raw.toISOString()}`
  if (typeof raw === 'bigint' || (typeof raw === 'number' && !Number.isFinite(raw))) return String(raw)
  return value
}

async function connect(config = {}) {
  const client = new pg.Client({ connectionTimeoutMillis: 10000, ssl: SSL, ...config })
  client.parameters = {}
  client.connection.on('parameterStatus', (m) => { client.parameters[m.parameterName] = m.parameterValue })
  client.on('error', () => {})
  await client.connect()
  await client.query(`set search_path to ${SCHEMA}, public`)
  return client
}

const ERROR_FIELDS = ['severity', 'code', 'message', 'detail', 'hint', 'position', 'internalPosition',
  'internalQuery', 'where', 'schema', 'table', 'column', 'dataType', 'constraint', 'file', 'line', 'routine']

function showError(e, label = 'error') {
  show(label, e.constructor.name)
  for (const f of ERROR_FIELDS) if (e[f] !== undefined) show(`  ${f}: ${e[f]}`)
}

async function fails(promise) {
  try {
    await promise
  } catch (e) {
    return showError(e)
  }
  show('no error, though one was expected')
}

const rows = async (c, ...args) => (await c.query(...args)).rows
const values = async (c, text, params) => (await c.query({ text, values: params, rowMode: 'array' })).rows

function add(name, fn) { cases.push([name, fn]) }

add('startup_parameters', async (c) => {
  for (const name of Object.keys(c.parameters).sort()) show(name, '=', c.parameters[name])
  show('has backend key', c.processID > 0, c.secretKey !== null)
})

add('startup_options', async () => {
  const c = await connect({ application_name: 'drv node', statement_timeout: 12345,
    options: '-c geqo=off -c work_mem=7MB' })
  for (const n of ['application_name', 'statement_timeout', 'geqo', 'work_mem'])
    show(n, await values(c, `show ${n}`))
  await c.query('reset all')
  show(await values(c, 'show statement_timeout'), await values(c, 'show geqo'))
  await c.end()
})

add('startup_failures', async () => {
  await fails(connect({ database: 'drv_no_such_database' }))
  await fails(connect({ options: '-c no_such_setting=1' }))
  await fails(connect({ options: '-c work_mem=banana' }))
  if (process.env.PGPASSWORD) {
    await fails(connect({ password: 'drv-wrong-password' }))
    await fails(connect({ user: 'drv_no_such_user', password: 'x' }))
  }
})

const brief = (r) => [].concat(r).map((x) => [x.command, x.rowCount, x.rows, x.fields.map((f) =>
  [f.name, f.dataTypeID, f.dataTypeSize, f.dataTypeModifier, f.format])])

add('simple_query', async (c) => {
  show(brief(await c.query('')))
  show(brief(await c.query(' ;; -- nothing')))
  show(brief(await c.query(`select 1 as a, 'x'::varchar(5) as b; create temp table q(a int);
    insert into q values (1), (2); select * from q; select from q; drop table q`)))
  await c.query('create temp table q(a int)')
  await fails(c.query('insert into q values (1); select 1/0; insert into q values (2)'))
  show(await values(c, 'select count(*) from q'))
  // node-pg keeps its own queue, so these go one by one but in order.
  show(await Promise.all([1, 2, 3, 4].map((i) => values(c, 'select $1::int', [i]))))
  const settled = await Promise.allSettled(['select 1', 'select 1/0', 'select 2'].map((q) => c.query(q)))
  show(settled.map((s) => s.status))
})

add('extended_query', async (c) => {
  show(brief(await c.query('select $1::int + $2::int as sum, $3::text as t', [2, 3, null])))
  show(brief(await c.query('', [])))
  show(await values(c, 'select i from generate_series(1, $1) i', [5]))
  show(brief(await c.query('create temp table e as select $1::int as a', [7])))
  await fails(c.query('select $1::int; select 2', [1]))
  await fails(c.query('select $1::int', ['not an int']))
  await fails(c.query('select $1::int', [1, 2]))
  await fails(c.query('select * from no_such where a = $1', [1]))
  const many = Array.from({ length: 1000 }, (_, i) => i)
  show(await values(c, 'select ' + many.map((i) => `$${i + 1}::int8`).join(' + '), many))
})

add('prepared_statements', async (c) => {
  for (let i = 0; i < 8; i++)
    show(await rows(c, { name: 'by name', text: 'select $1::int as a, $2::text as b', values: [i, null] }))
  show(await rows(c, 'select name, statement, parameter_types::text from pg_prepared_statements'))
  // A name may be used for one text only, which the driver checks itself.
  await c.query({ name: 'by name', text: 'select 1' }).then(() => show('accepted'), (e) => show(e.message))
  await fails(c.query({ name: 'bad', text: 'selct' }))
  await c.query('deallocate all')
  await fails(c.query({ name: 'by name', text: 'select $1::int as a, $2::text as b', values: [1, 'x'] }))
  show(await rows(c, { name: 'again', text: 'select $1::int as a', values: ['3'] }))
})

// Debian's version leaves a format code out of Bind when binary results are
// asked for. The server refuses such a message with an error like any other.
add('malformed_bind', async (c) => {
  for (const name of [undefined, 'named']) {
    const q = { name, text: 'select $1::int as a', values: [1], binary: true }
    await c.query(q).then((r) => show(r.rows), showError)
    show(await values(c, "select 'usable'"))
  }
})

add('prepared_after_ddl', async (c) => {
  await c.query('create table plan_t(a int); insert into plan_t values (1)')
  const q = { name: 'p', text: 'select * from plan_t' }
  show(await rows(c, q))
  await c.query('alter table plan_t add b int')
  await fails(c.query(q))
})

const TYPES = [
  ['bool', true], ['int2', -32768], ['int4', 2147483647], ['int8', '-9223372036854775808'],
  ['float4', 1.5], ['float8', 1e-300], ['float8', Infinity], ['float8', NaN],
  ['numeric', '12345678901234567890.123456789'], ['numeric', 'NaN'],
  ['text', 'naïve 中文 🦀 \'q\' \\'], ['text', ''], ['char(5)', 'ab'], ['name', 'n'],
  ['bytea', Buffer.from([...Array(256).keys()])], ['bytea', Buffer.alloc(0)],
  ['date', '1999-12-31'], ['time', '23:59:59.999999'], ['timetz', '01:02:03+05:30'],
  ['timestamptz', new Date(Date.UTC(2024, 1, 29, 12))], ['interval', '-3 days 5 seconds'],
  ['uuid', '12345678-1234-5678-1234-567812345678'], ['inet', '192.168.1.1/24'], ['cidr', '10.0.0.0/8'],
  ['json', { a: [1, null, 'x'] }], ['jsonb', { b: 1, a: { ü: true } }], ['point', '(1,2)'],
  ['circle', '<(0,0),5>'], ['int4range', '[1,10)'], ['int4[]', [1, null, 3]],
  ['text[]', ['a,b', '"', '', null]], ['int4[]', [[1, 2], [3, 4]]], ['bytea[]', [Buffer.from([0, 255])]],
  ['numeric[]', ['1.5', null]], ['bit(4)', '1010'], ['tsvector', 'a:1 b:2'], ['money', '12.34'],
]

add('types', async (c) => {
  await c.query("set time zone 'UTC'")
  for (const [type, value] of TYPES) {
    const r = await c.query(`select $1::${type} as v, null::${type} as n`, [value])
    const v = r.rows[0].v
    // A date without a zone would be shown in the zone of the machine.
    show(type, type === 'date' ? String(v instanceof Date) : [v], r.rows[0].n === null, r.fields[0].format)
  }
  const text = { getTypeParser: () => (x) => x }
  show(await rows(c, { text: "select now() is null as a, '2024-01-01'::date as b, row(1, null, 'x') as c", types: text }))
})

add('settings', async (c) => {
  for (const zone of ['UTC', 'America/New_York', 'Asia/Kolkata']) {
    await c.query(`set time zone '${zone}'`)
    show(c.parameters.TimeZone, await values(c,
      "select '2024-07-01 12:00:00+00'::timestamptz::text, '2024-07-01 12:00:00+00'::timestamptz"))
  }
  await c.query('begin')
  await c.query("set local application_name to 'local'")
  show(c.parameters.application_name)
  await c.query('rollback')
  show(c.parameters.application_name)
  await c.query("set client_encoding to 'LATIN1'")
  show(c.parameters.client_encoding, await values(c, "select octet_length(convert_to(chr(233), 'LATIN1'))"))
  await fails(c.query('select chr(8364)'))
  await c.query("set client_encoding to 'UTF8'")
  await fails(c.query("set work_mem to 'nope'"))
  await c.query("set work_mem to '5MB'")
  show(brief(await c.query('discard all')))
  show(await values(c, "select current_setting('work_mem') = '5MB'"), c.parameters.TimeZone !== 'Asia/Kolkata')
})

add('large_values', async (c) => {
  const blob = Buffer.alloc(1 << 20, 0).map((_, i) => (i * 7) % 251)
  show(await rows(c, 'select $1::bytea as v', [blob]))
  const text = 'z'.repeat(2 << 20)
  show(await values(c, `select length('${text}'), md5('${text}')`))
  show(md5((await values(c, "select repeat('abcdefgh', 2000000)"))[0][0]))
})

add('large_result', async (c) => {
  const got = await values(c, 'select i, md5(i::text) from generate_series(1, 200000) i')
  const hash = crypto.createHash('md5')
  for (const [a, b] of got) hash.update(a + b)
  show(got.length, hash.digest('hex'))
})

// node-pg has no COPY of its own; this is the least that speaks it, as a query
// the driver's queue accepts.
class Copy {
  constructor(text, { chunks = [], fail } = {}) {
    Object.assign(this, { text, chunks, fail, out: [], tags: [] })
    this.done = new Promise((resolve, reject) => Object.assign(this, { resolve, reject }))
  }

  submit(connection) { connection.query(this.text) }

  handleCopyInResponse(connection) {
    for (const chunk of this.chunks) connection.sendCopyFromChunk(Buffer.from(chunk))
    if (this.fail) connection.sendCopyFail(this.fail)
    else connection.endCopyFrom()
  }

  handleCopyData(msg) { this.out.push(Buffer.from(msg.chunk)) }
  handleRowDescription() {}
  handleDataRow() {}
  handleCommandComplete(msg) { this.tags.push(msg.text) }
  handleEmptyQuery() {}
  handlePortalSuspended() {}
  handleError(err) { this.error = err }

  handleReadyForQuery() {
    if (this.error) this.reject(this.error)
    else this.resolve({ tags: this.tags, data: Buffer.concat(this.out) })
  }
}

function copy(c, text, options) {
  const q = new Copy(text, options)
  c.query(q)
  // After an error the driver drops the active query before ReadyForQuery.
  q.handleError = (err) => q.reject(err)
  return q.done
}

add('copy', async (c) => {
  await c.query('create table copy_t(a int primary key, b text)')
  const chunks = Array.from({ length: 20000 }, (_, i) => `${i}\t${i % 3 ? 'x' + i : '\\N'}\n`)
  show((await copy(c, 'copy copy_t from stdin', { chunks })).tags)
  show((await copy(c, 'copy copy_t from stdin', { chunks: [] })).tags)
  for (const format of ['text', 'csv', 'binary']) {
    const r = await copy(c, `copy (select * from copy_t order by a) to stdout (format ${format})`)
    show(format, r.tags, r.data.length, md5(r.data))
  }
  const both = await copy(c, 'copy copy_t from stdin; copy (select 7) to stdout', { chunks: ['30000\ty\n'] })
  show(both.tags, both.data.toString())
  await fails(copy(c, 'copy copy_t from stdin', { chunks: ['50000\tx\n', 'oops\ty\n'] }))
  await fails(copy(c, 'copy copy_t from stdin', { chunks: ['1\tx\n', ...chunks] }))
  await fails(copy(c, 'copy copy_t from stdin', { chunks: ['50001\tx\n'], fail: 'client gave up' }))
  await fails(copy(c, 'copy (select 1/0) to stdout'))
  // The driver itself answers COPY FROM STDIN with CopyFail.
  await fails(c.query('copy copy_t from stdin'))
  await fails(c.query('copy copy_t from stdin', []))
  show(await values(c, 'select count(*), max(a) from copy_t'))
})

add('cursors', async (c) => {
  const read = (cur, n) => new Promise((res, rej) => cur.read(n, (e, r) => (e ? rej(e) : res(r))))
  const close = (cur) => new Promise((res, rej) => cur.close((e) => (e ? rej(e) : res())))
  let cur = c.query(new Cursor('select i from generate_series(1, $1::int) i', [1000]))
  let total = 0
  let batch
  while ((batch = await read(cur, 90)).length) for (const row of batch) total += row.i
  show(total)
  await close(cur)
  // Closed with the portal suspended.
  cur = c.query(new Cursor('select i from generate_series(1, 100) i'))
  show(await read(cur, 3))
  await close(cur)
  show(await values(c, "select 'usable'"))
  cur = c.query(new Cursor('select 10 / (5 - i) from generate_series(1, 9) i'))
  show(await read(cur, 3))
  await fails(read(cur, 3))
  show(await values(c, "select 'usable'"))
  await c.query('begin')
  await c.query('declare held scroll cursor with hold for select generate_series(1, 20) as i')
  show(await values(c, 'fetch 2 from held'))
  await c.query('commit')
  show(await values(c, 'fetch absolute 15 from held'), await values(c, 'fetch backward 2 from held'))
  await c.query('close held')
  await fails(c.query('fetch 1 from held'))
  // "rows" asks for a limited Execute, and the driver goes on by itself.
  show((await c.query({ text: 'select generate_series(1, 100) as i', rows: 7 })).rows.length)
})

add('transactions', async (c) => {
  await c.query('create table tx_t(a int)')
  await c.query('begin isolation level repeatable read')
  await c.query('insert into tx_t values ($1)', [1])
  await c.query('savepoint s')
  await fails(c.query('select 1/$1::int', [0]))
  await fails(c.query('select 1'))
  await c.query('rollback to s')
  await c.query('insert into tx_t values (2)')
  show(await values(c, 'show transaction_isolation'), brief(await c.query('commit')))
  show(await values(c, 'select array_agg(a order by a) from tx_t'))
  await c.query('begin')
  await fails(c.query('select no_such'))
  show((await c.query('commit')).command)
  await c.query('begin transaction isolation level serializable read only deferrable')
  await fails(c.query('delete from tx_t'))
  await c.query('rollback')
  if ((await values(c, 'show max_prepared_transactions'))[0][0] === '0') {
    show('two-phase commit skipped: max_prepared_transactions is 0')
  } else {
    await c.query('begin; insert into tx_t values (3)')
    show(brief(await c.query("prepare transaction 'drv_node_1'")))
    show(brief(await c.query("commit prepared 'drv_node_1'")), await values(c, 'select count(*) from tx_t'))
  }
})

add('errors', async (c) => {
  await c.query(`create table err_t(id int primary key, b text not null, c int check (c > 0));
    insert into err_t values (1, 'x', 1);
    create function err_raise() returns void language plpgsql as $$ begin
      raise exception 'custom %', 7 using errcode = 'HF001', detail = 'some detail', hint = 'some hint',
        column = 'col', constraint = 'cons', datatype = 'typ', table = 'tab', schema = 'sch'; end $$`)
  for (const q of ["insert into err_t values (1, 'y', 2)", "insert into err_t values (2, null, 2)",
    "insert into err_t values (2, 'y', -1)", 'select err_raise()', 'selct', 'select no_such from err_t',
    "select 'x", 'select 1/0', "select 'héé' +"]) {
    show('--', q)
    await fails(c.query(q))
    await fails(c.query(q, []))
  }
})

add('notices', async (c) => {
  c.on('notice', (n) => showError(n, 'notice'))
  await c.query("do $$ begin raise notice 'one'; raise warning 'two' using hint = 'h', detail = 'd'; end $$")
  await c.query('drop table if exists no_such_table')
  await c.query('commit')
})

add('listen_notify', async (c) => {
  const other = await connect()
  const stopped = new Promise((resolve) => c.on('notification', (n) => {
    show(n.channel, n.payload.length, md5(n.payload))
    if (n.payload === 'stop') resolve()
  }))
  await c.query('listen drv_chan; listen "Drv Other"')
  await other.query('notify drv_chan')
  await other.query("select pg_notify('drv_chan', $1)", ['long '.repeat(1500)])
  await other.query('begin; notify drv_chan, \'never\'; rollback')
  await c.query("notify drv_chan, 'to myself'")
  await other.query('notify "Drv Other", \'stop\'')
  await other.end()
  // The session is idle now, so the last one comes unasked for.
  await stopped
  await c.query('unlisten *')
  show(await values(c, 'select count(*) from pg_listening_channels()'))
})

add('cancel', async (c) => {
  // Repeated, since a request that comes before the query is ignored.
  const cancelled = async (query, ask) => {
    const running = fails(query)
    let over = false
    running.then(() => { over = true })
    while (!over) {
      await Promise.race([running, sleep(300)])
      if (!over) await ask()
    }
  }
  const byKey = () => new Promise((resolve) => {
    const con = new pg.Connection({ ssl: SSL })
    const go = () => con.cancel(c.processID, c.secretKey)
    con.on('connect', () => (SSL ? con.requestSsl() : go()))
    con.on('sslconnect', go)
    con.on('error', resolve)
    con.on('end', resolve)
    con.connect(c.port, c.host)
  })
  await cancelled(c.query('select pg_sleep(30)'), byKey)
  show(await values(c, "select 'usable'"))
  await cancelled(c.query('select pg_sleep($1)', [30]), byKey)
  await c.query('begin')
  await cancelled(c.query('select pg_sleep(30)'), byKey)
  await fails(c.query('select 1'))
  await c.query('rollback')
  const other = await connect()
  const pid = (await values(c, 'select pg_backend_pid()'))[0][0]
  await cancelled(c.query('select pg_sleep(30)'), () => other.query('select pg_cancel_backend($1)', [pid]))
  await other.end()
  await c.query("set statement_timeout to '200ms'")
  await fails(c.query('select pg_sleep(30)'))
  await fails(c.query('select pg_sleep($1)', [30]))
  await c.query('reset statement_timeout')
  show(await values(c, "select 'usable' from pg_sleep(0.25)"))
})

add('sessions', async (c) => {
  const other = await connect()
  show(await values(c, 'select pg_try_advisory_lock(770021)'), await values(other, 'select pg_try_advisory_lock(770021)'))
  await c.query('create temp table mine(a int)')
  await fails(other.query('select * from mine'))
  await other.end()
  const pool = new pg.Pool({ max: 5, ssl: SSL, connectionTimeoutMillis: 10000 })
  const got = await Promise.all(Array.from({ length: 60 }, (_, i) => pool.query('select $1::int as i', [i])))
  show(got.map((r) => r.rows[0].i))
  await pool.end()
})

add('closing', async (c) => {
  const name = 'drv_node_close'
  const count = async () => Number((await values(c,
    'select count(*) from pg_stat_activity where application_name = $1', [name]))[0][0])
  for (const how of ['terminate', 'drop']) {
    const other = await connect({ application_name: name })
    await other.query('begin; create table never_kept(a int)')
    show(await count())
    if (how === 'terminate') await other.end()
    else other.connection.stream.destroy()
    // The server notices a moment later.
    let tries = 0
    while (tries++ < 100 && (await count()) > 0) await sleep(50)
    show(how, tries < 100 ? 'session gone' : 'session still there')
  }
  show(await values(c, "select to_regclass('never_kept')"))
})

async function clean(create) {
  const c = new pg.Client({ connectionTimeoutMillis: 10000, ssl: SSL })
  await c.connect()
  const left = await c.query("select gid from pg_prepared_xacts where database = current_database() and gid like 'drv_node%'")
  for (const { gid } of left.rows) await c.query(`rollback prepared '${gid}'`)
  await c.query('set client_min_messages to warning')
  await c.query(`drop schema if exists ${SCHEMA} cascade`)
  if (create) await c.query(`create schema ${SCHEMA}`)
  await c.end()
}

async function main() {
  const watchdog = setTimeout(() => { show('watchdog: over 60 s'); process.exit(3) }, 60000)
  let failed = 0
  await clean(true)
  for (const [name, fn] of cases) {
    if (process.argv.length > 2 && !process.argv.includes(name)) continue
    show(`case: ${name}`)
    let c
    let timer
    try {
      c = await connect()
      await Promise.race([fn(c), new Promise((_, reject) => {
        timer = setTimeout(() => reject(new Error(`case took over ${CASE_MS} ms`)), CASE_MS)
      })])
    } catch (e) {
      failed++
      show('unexpected', e.constructor.name, e.code || '')
      console.error(e)
    }
    clearTimeout(timer)
    // The timer must not keep a finished program alive.
    if (c) await Promise.race([c.end(), new Promise((resolve) => setTimeout(resolve, 5000).unref())])
  }
  await clean(false)
  clearTimeout(watchdog)
  show('done, unexpected failures:', failed)
  process.exitCode = failed ? 1 : 0
}

main().catch((e) => { console.error(e); process.exit(2) })
