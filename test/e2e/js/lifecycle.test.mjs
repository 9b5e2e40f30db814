import assert from 'node:assert/strict'
import { after, before, describe, it } from 'node:test'
import { AuthenticationError, NotFoundError, Sandbox, SandboxError } from 'e2b'
import { eventually } from './common.mjs'

const drain = async (paginator) => {
  const all = []
  while (paginator.hasNext) all.push(...(await paginator.nextItems()))
  return all
}

describe('lifecycle', () => {
  let sandbox
  const tag = `js-${process.env.MODE}-${process.pid}`
  const metadata = { suite: tag, 'odd key': 'a b&c=d/é?', empty: '' }
  before(async () => {
    sandbox = await Sandbox.create('base', { timeoutMs: 300_000, metadata, envs: { FROM_CREATE: 'yes, "quoted" $HOME' } })
  })
  after(async () => { await sandbox?.kill() })

  it('gives a sandbox that runs', async () => {
    assert.match(sandbox.sandboxId, /^[a-z0-9]+$/)
    assert.equal(await sandbox.isRunning(), true)
    assert.equal((await sandbox.commands.run('echo hello')).stdout, 'hello\n')
  })

  it('passes variables given at creation to every process', async () => {
    const { stdout } = await sandbox.commands.run('printf %s "$FROM_CREATE|$E2B_SANDBOX_ID|$E2B_SANDBOX"')
    assert.equal(stdout, `yes, "quoted" $HOME|${sandbox.sandboxId}|true`)
  })

  it('describes itself in getInfo', async () => {
    const info = await sandbox.getInfo()
    assert.equal(info.sandboxId, sandbox.sandboxId)
    assert.equal(info.name, 'base')
    assert.equal(info.state, 'running')
    assert.deepEqual(info.metadata, metadata)
    assert.ok(info.cpuCount >= 1 && info.memoryMB >= 128, JSON.stringify(info))
    const life = info.endAt - info.startedAt
    assert.ok(life > 290_000 && life < 310_000, `lives for ${life} ms`)
  })

  it('is found by id with connect, which does not shorten its life', async () => {
    const before = (await sandbox.getInfo()).endAt
    const again = await Sandbox.connect(sandbox.sandboxId, { timeoutMs: 1000 })
    assert.equal(again.sandboxId, sandbox.sandboxId)
    assert.equal((await again.commands.run('echo again')).stdout, 'again\n')
    assert.ok((await again.getInfo()).endAt >= before)
  })

  it('is listed by its metadata, odd characters included', async () => {
    const found = await drain(Sandbox.list({ query: { metadata, state: ['running'] } }))
    assert.deepEqual(found.map((s) => s.sandboxId), [sandbox.sandboxId])
    assert.deepEqual(found[0].metadata, metadata)
    const other = await drain(Sandbox.list({ query: { metadata: { ...metadata, suite: 'other' } } }))
    assert.deepEqual(other, [])
  })

  it('is listed page by page, newest first', async () => {
    const made = []
    try {
      for (let i = 0; i < 3; i++) made.push(await Sandbox.create('base', { timeoutMs: 60_000, metadata: { pages: tag } }))
      const pages = []
      const paginator = Sandbox.list({ query: { metadata: { pages: tag } }, limit: 2 })
      while (paginator.hasNext) pages.push((await paginator.nextItems()).map((s) => s.sandboxId))
      const ids = made.map((s) => s.sandboxId).reverse()
      assert.deepEqual(pages, [ids.slice(0, 2), ids.slice(2)])
      const oldest = await drain(Sandbox.list({ query: { metadata: { pages: tag } }, order: 'asc' }))
      assert.deepEqual(oldest.map((s) => s.sandboxId), [...ids].reverse())
    } finally {
      await Promise.all(made.map((s) => s.kill()))
    }
  })

  it('shows metrics within 30 seconds', async () => {
    const [first] = await eventually('metrics', async () => {
      const points = await sandbox.getMetrics()
      return points.length > 0 && points
    }, 30_000)
    assert.ok(first.timestamp instanceof Date && Math.abs(Date.now() - first.timestamp) < 120_000, String(first.timestamp))
    assert.ok(first.cpuCount >= 1)
    assert.ok(first.memTotal > 0 && first.memUsed > 0 && first.memUsed <= first.memTotal, JSON.stringify(first))
    assert.ok(first.diskTotal > 0 && first.diskUsed >= 0, JSON.stringify(first))
  })

  it('ends early when setTimeout says so', async () => {
    const short = await Sandbox.create('base', { timeoutMs: 60_000 })
    await short.setTimeout(1000)
    await eventually('expiry', async () => !(await short.isRunning()))
    await assert.rejects(short.getInfo(), NotFoundError)
  })

  it('ends when the time given at creation is over', async () => {
    const short = await Sandbox.create('base', { timeoutMs: 1000 })
    await eventually('expiry', async () => !(await short.isRunning()))
  })

  it('is gone after kill, and a second kill says so', async () => {
    const victim = await Sandbox.create('base', { timeoutMs: 60_000 })
    assert.equal(await victim.kill(), true)
    assert.equal(await victim.isRunning(), false)
    assert.equal(await victim.kill(), false)
    await assert.rejects(victim.getInfo(), NotFoundError)
    await assert.rejects(Sandbox.connect(victim.sandboxId), NotFoundError)
    await assert.rejects(victim.commands.run('true'), SandboxError)
    await assert.rejects(victim.files.read('/etc/hostname'), SandboxError)
  })

  it('aborts running streams on kill with an error that says so', async () => {
    const victim = await Sandbox.create('base', { timeoutMs: 60_000 })
    let started
    const output = new Promise((resolve) => (started = resolve))
    const handle = await victim.commands.run('echo started; sleep 600', { background: true, onStdout: started, timeoutMs: 0 })
    await output
    const watcher = await victim.files.watchDir('/tmp', () => {}, { timeoutMs: 0 })
    assert.ok(watcher)
    const ended = assert.rejects(handle.wait(), (err) => {
      assert.ok(err instanceof SandboxError, String(err))
      assert.match(err.message, /killed|not found|timeout/i)
      return true
    })
    assert.equal(await victim.kill(), true)
    await ended
  })

  it('says which template it does not know', async () => {
    await assert.rejects(Sandbox.create('no-such-template'), (err) => {
      assert.match(err.message, /404/)
      assert.match(err.message, /no-such-template/)
      return true
    })
  })

  it('refuses a wrong API key', async () => {
    const apiKey = 'e2b_' + '0'.repeat(40)
    await assert.rejects(Sandbox.create('base', { apiKey }), AuthenticationError)
    await assert.rejects(Sandbox.list({ apiKey }).nextItems(), AuthenticationError)
  })

  it('shows that the internet was denied', async () => {
    const closed = await Sandbox.create('base', { timeoutMs: 60_000, allowInternetAccess: false })
    try {
      assert.equal((await closed.getInfo()).allowInternetAccess, false)
    } finally {
      await closed.kill()
    }
  })
})
