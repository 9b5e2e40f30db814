import assert from 'node:assert/strict'
import { createHash, randomBytes } from 'node:crypto'
import { after, before, describe, it } from 'node:test'
import { FileNotFoundError, FilesystemEventType, FileType, InvalidArgumentError, Sandbox } from 'e2b'
import { eventually } from './common.mjs'

const sha256 = (data) => createHash('sha256').update(data).digest('hex')

describe('files', () => {
  let sandbox, files
  before(async () => {
    sandbox = await Sandbox.create('base', { timeoutMs: 300_000 })
    files = sandbox.files
  })
  after(async () => { await sandbox?.kill() })

  it('are written and read as text, bytes, blob and stream', async () => {
    const text = 'line one\nline two é€𝄞\n'
    const info = await files.write('notes/deep/a.txt', text)
    assert.equal(info.path, '/home/user/notes/deep/a.txt')
    assert.equal(info.name, 'a.txt')
    assert.equal(await files.read('notes/deep/a.txt'), text)
    assert.equal(Buffer.from(await files.read(info.path, { format: 'bytes' })).toString(), text)
    assert.equal(await (await files.read(info.path, { format: 'blob' })).text(), text)
    const stream = await files.read(info.path, { format: 'stream' })
    const parts = []
    for await (const part of stream) parts.push(part)
    assert.equal(Buffer.concat(parts).toString(), text)
    assert.equal((await sandbox.commands.run('cat notes/deep/a.txt')).stdout, text)
  })

  it('are replaced whole, also by something shorter or empty', async () => {
    await files.write('replace', 'a long first version')
    await files.write('replace', 'short')
    assert.equal(await files.read('replace'), 'short')
    await files.write('replace', '')
    assert.equal(await files.read('replace'), '')
  })

  it('make the round trip with 50 MB of random bytes', async () => {
    const data = randomBytes(50 << 20)
    await files.write('big.bin', data.buffer.slice(data.byteOffset, data.byteOffset + data.length))
    const { stdout } = await sandbox.commands.run('sha256sum big.bin | cut -c1-64')
    assert.equal(stdout.trim(), sha256(data))
    assert.equal(sha256(await files.read('big.bin', { format: 'bytes' })), sha256(data))
    await files.remove('big.bin')
  })

  it('are uploaded as a raw stream and gzipped', async () => {
    const data = randomBytes(3 << 20)
    const body = new Blob([data]).stream()
    await files.write('raw.bin', body, { useOctetStream: true })
    assert.equal(sha256(await files.read('raw.bin', { format: 'bytes' })), sha256(data))
    const text = 'the same again and again\n'.repeat(100_000)
    await files.write('gzipped.txt', text, { gzip: true })
    assert.equal(await files.read('gzipped.txt', { gzip: true }), text)
  })

  it('are written many at once', async () => {
    const entries = Array.from({ length: 20 }, (_, i) => ({ path: `many/${i}.txt`, data: `file ${i}` }))
    const infos = await files.writeFiles(entries)
    assert.deepEqual(infos.map((i) => i.path), entries.map((e) => `/home/user/${e.path}`))
    assert.equal(await files.read('many/19.txt'), 'file 19')
  })

  it('keep names with spaces and all kinds of letters', async () => {
    for (const name of ['with space.txt', 'ünïcødé.txt', '文件.txt', '😀 & #?%41.txt', "quo'te\".txt"]) {
      const info = await files.write(`names/${name}`, name)
      assert.equal(info.name, name)
      assert.equal(await files.read(`names/${name}`), name)
    }
    const listed = (await files.list('names')).map((e) => e.name)
    assert.ok(listed.includes('文件.txt') && listed.includes('😀 & #?%41.txt'), JSON.stringify(listed))
  })

  it('are listed to the depth asked for', async () => {
    await sandbox.commands.run('mkdir -p tree/a/b/c && touch tree/top tree/a/mid tree/a/b/low && ln -s top tree/link')
    const names = async (depth) => (await files.list('tree', depth && { depth })).map((e) => e.path.slice('/home/user/tree/'.length)).sort()
    assert.deepEqual(await names(), ['a', 'link', 'top'])
    assert.deepEqual(await names(2), ['a', 'a/b', 'a/mid', 'link', 'top'])
    assert.deepEqual(await names(4), ['a', 'a/b', 'a/b/c', 'a/b/low', 'a/mid', 'link', 'top'])
    await assert.rejects(files.list('tree', { depth: 0 }), InvalidArgumentError)
    await assert.rejects(files.list('no-such-dir'), FileNotFoundError)
  })

  it('are described by getInfo', async () => {
    await files.write('described', '12345')
    const info = await files.getInfo('described')
    assert.equal(info.type, FileType.FILE)
    assert.equal(info.size, 5)
    assert.equal(info.permissions, '-rw-r--r--')
    assert.equal(info.mode & 0o777, 0o644)
    assert.equal(info.owner, 'user')
    assert.equal(info.group, 'user')
    assert.ok(Math.abs(Date.now() - info.modifiedTime) < 60_000, String(info.modifiedTime))
    assert.equal((await files.getInfo('/etc')).type, FileType.DIR)
    const link = await files.getInfo('tree/link')
    assert.equal(link.symlinkTarget, '/home/user/tree/top')
  })

  it('are renamed, removed and seen to exist', async () => {
    await files.write('before', 'x')
    const moved = await files.rename('before', 'after')
    assert.equal(moved.path, '/home/user/after')
    assert.equal(await files.exists('before'), false)
    assert.equal(await files.exists('after'), true)
    await files.remove('after')
    assert.equal(await files.exists('after'), false)
    await assert.rejects(files.rename('before', 'after'), FileNotFoundError)
  })

  it('lie in directories that are made once', async () => {
    assert.equal(await files.makeDir('made/deep'), true)
    assert.equal(await files.makeDir('made/deep'), false)
    assert.equal((await files.getInfo('made/deep')).type, FileType.DIR)
    await files.write('made/deep/file', '')
    await files.remove('made')
    assert.equal(await files.exists('made'), false)
  })

  it('that are missing or no files fail with what they are', async () => {
    await assert.rejects(files.read('missing'), FileNotFoundError)
    await assert.rejects(files.read('/etc'), InvalidArgumentError)
    await assert.rejects(files.makeDir('described'), InvalidArgumentError)
  })

  it('belong to the user who writes them', async () => {
    await files.write('/root/secret', 'for root', { user: 'root' })
    assert.equal((await files.getInfo('/root/secret', { user: 'root' })).owner, 'root')
    assert.equal(await files.read('/root/secret', { user: 'root' }), 'for root')
    await files.write('rooted', 'x', { user: 'root' })
    assert.equal(await files.read('/root/rooted', { user: 'root' }), 'x')
  })

  it('are watched', async () => {
    await files.makeDir('watched')
    const seen = []
    const watch = await files.watchDir('watched', (event) => { seen.push(`${event.type} ${event.name}`) })
    await files.write('watched/new.txt', 'first')
    await eventually('create and write', () => seen.includes(`${FilesystemEventType.CREATE} new.txt`) && seen.includes(`${FilesystemEventType.WRITE} new.txt`))
    await files.rename('watched/new.txt', 'watched/other.txt')
    await eventually('rename', () => seen.includes(`${FilesystemEventType.RENAME} new.txt`))
    await sandbox.commands.run('chmod 600 watched/other.txt')
    await eventually('chmod', () => seen.includes(`${FilesystemEventType.CHMOD} other.txt`))
    await files.remove('watched/other.txt')
    await eventually('remove', () => seen.includes(`${FilesystemEventType.REMOVE} other.txt`))
    await watch.stop()
    const count = seen.length
    await files.write('watched/late.txt', '')
    assert.equal(seen.length, count)
    await assert.rejects(files.watchDir('no-such-dir', () => {}), FileNotFoundError)
  })

  it('are watched in directories below, new ones included', async () => {
    await files.makeDir('above/below')
    const seen = []
    const watch = await files.watchDir('above', (event) => { seen.push(event) }, { recursive: true, includeEntry: true })
    await files.write('above/below/one', '1')
    const first = await eventually('event below', () => seen.find((e) => e.name === 'below/one' && e.entry))
    assert.equal(first.entry.path, '/home/user/above/below/one')
    await files.makeDir('above/fresh')
    await eventually('a new directory is watched too', async () => {
      await files.write('above/fresh/two', '2')
      return seen.some((e) => e.name === 'fresh/two')
    })
    await watch.stop()
  })

  it('hold a git repository that is cloned, changed and pushed', async () => {
    await sandbox.commands.run('git init -q --bare origin.git')
    await sandbox.git.clone('/home/user/origin.git', { path: 'work' })
    await files.write('work/readme', 'hello')
    await sandbox.commands.run(
      'git config user.email a@b.c && git config user.name A && git add -A && git commit -qm first && git push -q origin HEAD',
      { cwd: '/home/user/work' },
    )
    await sandbox.git.clone('/home/user/origin.git', { path: 'copy' })
    assert.equal(await files.read('copy/readme'), 'hello')
  })
})
